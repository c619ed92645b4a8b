"""Fine-tuning: adapters, tasks and their data, on the same model, loop and optimizer as `fastgpt train`."""
