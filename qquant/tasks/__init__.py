"""Public benchmarks through lm-eval, whose prompts, scoring and standard errors stay its own.

`run` is the story. What is qquant's own: data sets in their original files (`local`), Qwen's
zero-shot chat protocol (`chat` has its texts, `preset` makes lm-eval tasks of them), and a sandbox
for code that a model wrote (`sandbox`). lm-eval is imported only when a task is asked for.
"""
