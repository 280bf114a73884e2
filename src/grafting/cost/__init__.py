"""What a model, a plan and a run cost: counted, and measured."""
