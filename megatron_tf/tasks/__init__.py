"""Tasks, one folder each: its configuration, the layers around the blocks, its loss, its data and its metrics.

`base.Task` is the interface of a task, `layers.TaskLayers` and `data.TaskData` are those of its parts that need torch.
`TASKS.register(name, object)` registers a new task; no code outside its own module has to change.
"""
