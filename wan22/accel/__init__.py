"""What makes the models faster or smaller: attached from outside, and detached again."""
