"""The five stages, one file each: depth, wanda, lora, gptq, eora; and before them, where asked for, vocabulary and pad;
and tune after gptq.

Every stage is a module with VERSION, Options, plan(shape, options), cost(shape, options) and run(source, target,
calibration, options, runtime); none imports another, nor the pipeline. What several need has a module of its own
(hessian, dense, training); README.md beside this file shows how to add a stage's further method.
"""
