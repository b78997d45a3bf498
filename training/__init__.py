import os

# Intel's matrix products choose by chance how they share work among threads, and the last bits of a result with it.
# AUTO binds them to one way for each processor and number of threads. MKL reads this before its first product.
os.environ["MKL_CBWR"] = os.environ.get("MKL_CBWR") or "AUTO"
