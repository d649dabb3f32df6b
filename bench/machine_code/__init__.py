"""What compilers make of the CUDA and Triton kernels, read without a GPU."""
