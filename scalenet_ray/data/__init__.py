"""Files: storage, images, masks, COCO annotations, schemas, policies."""
