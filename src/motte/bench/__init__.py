"""One interleaved run of every way to execute a model: cases, results, comparisons."""
