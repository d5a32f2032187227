"""Language models: tokens + visual tokens -> hidden states."""
