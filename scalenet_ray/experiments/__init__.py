"""The paper's experiments on MNIST and CIFAR-10 (Tables 2 to 4)."""
