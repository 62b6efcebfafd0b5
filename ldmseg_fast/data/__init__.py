"""COCO-panoptic folders: reading, checking, generating. The modules are imported by name, so that none drags in torch
for those that do without it."""
