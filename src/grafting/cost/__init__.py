"""Cost of a model, a plan and a run: counted, and measured."""
