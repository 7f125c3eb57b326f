"""Steps that commands and the Python interface share: prepare inputs, evaluate or detect, write the report."""
