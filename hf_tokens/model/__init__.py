"""What a model is: its streams, parts, signatures and towers. Every fact that is looked up by name or shape lives here."""
