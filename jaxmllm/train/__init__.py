"""Training: batches -> next state. Nothing here knows a stage of the model."""
