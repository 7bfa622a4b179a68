"""The config-driven decoder, its scalar heads, and the roles it plays."""
