"""Cases and pairs to train and to test on."""
