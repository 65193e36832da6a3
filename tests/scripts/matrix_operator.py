"""A matrix as the analyses take an operator: its shape and its products, checked by nobody."""


class Matrix:
    def __init__(self, dense):
        self.dense, self.shape = dense, tuple(dense.shape)

    def A(self, x):
        return x @ self.dense.T

    def A_adjoint(self, y):
        return y @ self.dense
