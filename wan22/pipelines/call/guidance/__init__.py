"""How the predictions of a step's passes become one velocity: a formula a class, its settings its fields."""
