"""The optimizers: `zeroth_order` composes direction, estimate, transform and update into a torch optimizer.

Read `zeroth_order`, then `recorded_steps` (what follows from the record of a step, in a run and in a replay), then
`hybrid` (the lower layers by forward passes, the upper ones by back-propagation). `base` counts steps, `deferred` lets
the updates of streamed layers wait for them, `record` holds the numbers of one step, `checks` refuses options that
cannot work. `pass_cost` expresses the passes of any optimizer in forward passes.
"""
