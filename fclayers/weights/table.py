"""The registered forms, one per line."""

from fclayers.weights import blockdiagonal, int8, lora, lowrank, transposed, weightnorm
from fclayers.weights.form import register_weight

register_weight(lowrank.LowRank, lowrank.FORM)
register_weight(int8.Int8, int8.FORM)
register_weight(lora.Lora, lora.FORM)
register_weight(weightnorm.WeightNorm, weightnorm.FORM)
register_weight(blockdiagonal.BlockDiagonal, blockdiagonal.FORM)
register_weight(transposed.Transposed, transposed.FORM)
