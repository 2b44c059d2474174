"""What the model reads while it is quantized, and the walk that shows it to the model.

In the order the data flows: `sources` finds documents (with `formats`, which knows the record
layouts), `render` turns a document into token ids as the checkpoint's chat format wants them,
`tokens` mixes, shuffles, packs and hashes, `walk` feeds the result through the network. Nothing
is imported here, so that `qquant.calibration` costs nothing until a part of it is used.
"""
