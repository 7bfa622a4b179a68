"""What a stage would take on a mesh: memory, operations and traffic, compiled from shapes alone."""
