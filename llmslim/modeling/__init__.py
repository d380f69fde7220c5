"""The structures and the model classes that load them; plain torch and transformers."""
