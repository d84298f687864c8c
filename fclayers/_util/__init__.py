"""Helpers that all subpackages share: errors, trees, tables, files, meshes."""
