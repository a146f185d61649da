"""Warm-up, GRPO fine-tuning and what they share."""
