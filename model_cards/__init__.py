"""Model cards: the template of published runs, and the cards of released checkpoints."""
