// Which pixels a transposed convolution, or its input gradient, gathers: one axis at a time.
//
//     out pixel = r * phases + phase,   in pixel = r * in_step + (phase + offset - tap * step) / phases
//
// forward: phases = stride, offset = padding, step = dilation, in_step = 1; taps for which the division leaves a rest
// do not meet the phase. dgrad: phases = 1, offset = -padding, step = -dilation, in_step = stride.
#pragma once

// An axis of one phase. Its taps are first, first + every, ...; those are `count`, and the i-th one's source is r *
// in_step + shift + i * shift_step.
struct Axis {
    int phase, first, every, count, shift, shift_step;

    __device__ Axis(int phase, int phases, int taps, int offset, int step) : phase(phase), first(0), every(1) {
        if (phases > 1) {
            int next = step % phases;  // phases from a tap to the next
            for (int rest = (phase + offset) % phases; first < taps && rest; first++)
                rest = rest < next ? rest - next + phases : rest - next;
            for (int rest = next; rest; every++) rest = rest < phases - next ? rest + next : rest + next - phases;
        }
        count = first < taps ? (taps - 1 - first) / every + 1 : 0;
        shift = (phase + offset - first * step) / phases;
        shift_step = -(every * step / phases);
    }
};
