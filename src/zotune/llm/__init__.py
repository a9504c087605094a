"""Fine-tuning language models: models, data, objectives, evaluation and the training run."""
