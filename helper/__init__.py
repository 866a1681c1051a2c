"""What a run is made of: options, recipes, teacher, loops, metrics, run folder."""
