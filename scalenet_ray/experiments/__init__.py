"""The paper's experiments on MNIST, CIFAR-10 (Tables 2 to 4) and COCO (Tables 5 and 6)."""
