/* Reads the inputs of a network from a file of the host, runs it, and writes its outputs to another. */
#include <stdio.h>

#include "sizes.h" /* INPUTS and OUTPUTS, floats */

void network(const float *input, float *output);

static float input[INPUTS], output[OUTPUTS];

int main(void) {
    FILE *file = fopen("input.bin", "rb");
    if (file == NULL || fread(input, sizeof(float), INPUTS, file) != INPUTS) return 1;
    fclose(file);
    network(input, output);
    file = fopen("output.bin", "wb");
    if (file == NULL || fwrite(output, sizeof(float), OUTPUTS, file) != OUTPUTS) return 1;
    return fclose(file);
}
