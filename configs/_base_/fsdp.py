# Weights, gradients and optimiser state spread over all processes, instead of a copy on each (DDP).
model_wrapper_cfg = dict(type='FullyShardedModel')
