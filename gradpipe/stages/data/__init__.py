"""What a model is calibrated and measured on."""
