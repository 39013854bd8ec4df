"""The page of `ldm demo`: server, guard, forms, and the queue of drawings."""
