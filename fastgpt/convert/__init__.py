"""`fastgpt import` and `fastgpt export`: runs of fastgpt from and to the files of other projects."""
