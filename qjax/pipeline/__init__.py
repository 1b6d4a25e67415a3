"""One model: its recipe, the loop over its blocks, the records of what is finished."""
