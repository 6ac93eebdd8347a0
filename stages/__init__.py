"""An image classifier: three DVC stages (prepare, train, evaluate) and a few commands."""
