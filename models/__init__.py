"""What a family is, and how a forward pass is composed."""
