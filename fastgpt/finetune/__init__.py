"""Fine-tuning: adapters, tasks and their data, on the same model, loop and optimizer as `fastgpt train`.

Data, from files to batches:

    template = Template.of_run(checkpoint, eos_token)            # fastgpt.inference.chat, for conversations
    rows = Rows(format="auto", columns={}, loss="completions", too_long="cut", defects="fail")
    loaded = load_examples(path, tokenizer, template, context, rows)       # Loaded(name, items, counts, labels)
    load_pairs(path, tokenizer, template, context, rows)                   # items: Pair(chosen, rejected)
    load_ratings(path, tokenizer, template, context, rows)                 # items: Rated(example, good)
    load_labelled(path, tokenizer, context, head, labels, rows)            # items: Classified(ids, label)

    for line in summary(loaded): ...                             # render.py: share of learned tokens, rows left out
    print(rendered(loaded.items[0], tokenizer))                  # one example, with its learned parts marked

    ExampleLoader([loaded.items, ...], batch, block, packing="best-fit", weights=None, seed=0, device="cpu", pad=0)
    PairLoader, RatedLoader, LabelledLoader                      # the same arguments; batch counts pairs, texts
    len(loader)                                                  # batches of an epoch
    loader.once(batches=None)                                    # one pass in order, for validation

Load each file of a mixture by itself: the loaders take a list of items for each, their weights, and say in
extra["task"] which one a row or a pair is from. For the validation loss of each task, make a loader of each.
"""
