"""The machinery of the experiments: what one is, how it is run, kept, judged and shown."""
