// Atomic functions: threads run one at a time, so each is a plain read and write. A part of cuda.h.

// read: what a plain read before may have given, and null if it may not: see race() of accesses.cpp.
#define EMULATOR_ATOMIC_OF(name, T, read, value) \
    UNCHECKED static inline T name(T* p, T v) { \
        emulator::atomic(p, sizeof(T), EMULATOR_CALLER, read); \
        T old = *p; \
        *p = value; \
        return old; \
    }
#define EMULATOR_CAS_OF(name, T) \
    UNCHECKED static inline T name(T* p, T compare, T v) { \
        emulator::atomic(p, sizeof(T), EMULATOR_CALLER, &compare); \
        T old = *p; \
        if (old == compare) *p = v; \
        return old; \
    }
#define EMULATOR_ATOMIC_IF(name, T, read, value) \
    EMULATOR_ATOMIC_OF(name, T, read, value) \
    EMULATOR_ATOMIC_OF(name##_block, T, read, value) EMULATOR_ATOMIC_OF(name##_system, T, read, value)
#define EMULATOR_ATOMIC(name, T, value) EMULATOR_ATOMIC_IF(name, T, nullptr, value)
#define EMULATOR_CAS(T) \
    EMULATOR_CAS_OF(atomicCAS, T) EMULATOR_CAS_OF(atomicCAS_block, T) EMULATOR_CAS_OF(atomicCAS_system, T)
#define EMULATOR_ORDERED_ATOMICS(T) \
    EMULATOR_ATOMIC_IF(atomicMin, T, p, v < old ? v : old) \
    EMULATOR_ATOMIC_IF(atomicMax, T, p, v > old ? v : old) \
    EMULATOR_ATOMIC_IF(atomicAnd, T, p, old& v) \
    EMULATOR_ATOMIC_IF(atomicOr, T, p, old | v) EMULATOR_ATOMIC(atomicXor, T, old ^ v)
#define EMULATOR_INTEGER_ATOMICS(T) \
    EMULATOR_ORDERED_ATOMICS(T) EMULATOR_ATOMIC(atomicAdd, T, old + v) EMULATOR_ATOMIC(atomicExch, T, v) EMULATOR_CAS(T)
EMULATOR_INTEGER_ATOMICS(int) EMULATOR_INTEGER_ATOMICS(unsigned) EMULATOR_INTEGER_ATOMICS(unsigned long long)
EMULATOR_ORDERED_ATOMICS(long long) EMULATOR_CAS_OF(atomicCAS, unsigned short)
EMULATOR_ATOMIC(atomicAdd, float, old + v) EMULATOR_ATOMIC(atomicExch, float, v)
EMULATOR_ATOMIC(atomicAdd, double, old + v) EMULATOR_ATOMIC(atomicSub, int, old - v)
EMULATOR_ATOMIC(atomicSub, unsigned, old - v) EMULATOR_ATOMIC(atomicInc, unsigned, old >= v ? 0 : old + 1)
EMULATOR_ATOMIC(atomicDec, unsigned, old == 0 || old > v ? v : old - 1)
