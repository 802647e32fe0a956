"""JSON Schemas of what people write and programs read, for editors and for those who check the gate's output.

Enters: nothing. Leaves: the files beside this one, each generated from the models that the tool itself reads or writes.
"""
