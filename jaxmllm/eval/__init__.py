"""From a trained state to answers and numbers."""
