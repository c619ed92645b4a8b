"""More rows for training, made from those that there are: the setting `augment` of `fastgpt finetune`."""
