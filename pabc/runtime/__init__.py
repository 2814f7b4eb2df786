"""What runs compiled models: captured programs, the state of generations, guards, counts."""
