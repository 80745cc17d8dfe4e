"""One folder a task: its configuration, the layers around the blocks, its loss, its data and what it measures.

`base.Task` says what a task has to give, `layers.TaskLayers` and `data.TaskData` its parts that need torch. A new one
is registered by `TASKS.register(name, object)`; nothing outside its own module has to know it.
"""
