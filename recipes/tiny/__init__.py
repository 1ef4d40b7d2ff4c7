"""How the bundled model was made: data, tokenizer, network, training, export. See README.md."""
