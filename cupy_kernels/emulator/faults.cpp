// What ends a kernel from outside: faults of the processor, Ctrl-C, the time limit. A part of runtime.cpp.
namespace emulator {

static const int signals[] = {SIGSEGV, SIGBUS, SIGFPE, SIGINT, SIGURG};
enum { SIGNALS = 5 };
static struct sigaction before[SIGNALS];  // what the process does about them
static thread_local bool runs_here;
static pthread_t runner;
static const char* volatile stopped;  // why the launch must end

static bool in_a_fiber(void* context) {
#if defined(__x86_64__)
    char* stack_pointer = (char*)((ucontext_t*)context)->uc_mcontext.gregs[REG_RSP];
#else
    char* stack_pointer = (char*)((ucontext_t*)context)->uc_mcontext.sp;
#endif
    return size_t(stack_pointer - stacks) < MAX_THREADS * (STACK_BYTES + STACK_GAP);
}

// What goes wrong in a kernel ends the kernel, not the process: a notebook goes on.
static void on_signal(int number, siginfo_t* info, void* context) {
    if (number == SIGINT) stopped = "interrupted";
    if (number == SIGINT || number == SIGURG) {
        if (!stopped) return;
        if (!runs_here) pthread_kill(runner, SIGURG);
        else if (in_a_fiber(context)) FAIL("%s", stopped);
        else report("%s", stopped);
        return;
    }
    if (!runs_here || error[0] || !in_a_fiber(context)) {  // not a fault of the kernel: it comes again, to the process
        for (int i = 0; i < SIGNALS; i++)
            if (signals[i] == number) sigaction(number, &before[i], nullptr);
        return;
    }
    char* address = (char*)info->si_addr;
    if (number == SIGFPE) FAIL("thread %d divides an integer by zero", current);
    else if (size_t(address - stacks) < MAX_THREADS * (STACK_BYTES + STACK_GAP))
        FAIL(
            "thread %d needs more than %d KiB of local memory: a large array, or a recursion without end", current,
            int(STACK_BYTES >> 10));
    else FAIL("thread %d reads or writes far out of bounds, at %p", current, address);
}

extern "C" EXPORTED void emulator_stop() {
    stopped = "takes longer than CUPY_KERNELS_TIMEOUT allows";
    pthread_kill(runner, SIGURG);
}

}  // namespace emulator
