"""The engine on DeepSpeed. Nothing outside this folder imports it, and `patches` is all that replaces private parts of
it."""
