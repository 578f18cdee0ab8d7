// What ends a kernel from outside: faults of the processor, Ctrl-C, the time limit. A part of runtime.cpp.
namespace emulator {

static const int signals[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGINT, SIGURG};
enum { SIGNALS = 6 };
static struct sigaction before[SIGNALS];  // what the process does about them
static thread_local bool runs_here;
static pthread_t runner;
static volatile bool running;
static const char* const INTERRUPTED = "interrupted";
static const char* volatile stopped;  // why the launch must end

static bool is_code(const char* address) { return in_image(address) && !variable(address); }

struct Registers { char *stack_pointer, *program_counter; };

static Registers registers(void* context) {
    mcontext_t& all = ((ucontext_t*)context)->uc_mcontext;
#if defined(__x86_64__)
    return {(char*)all.gregs[REG_RSP], (char*)all.gregs[REG_RIP]};
#else
    return {(char*)all.sp, (char*)all.pc};
#endif
}

// The kernel's line as the beginning of an error: where it runs, or called the runtime.
static Where line_of(void* context) {
    Where where = {};
    Registers now = registers(context);
    char* at = now.program_counter + 1;
    char* next = now.stack_pointer > stack_low ? now.stack_pointer : stack_low;
    for (; !is_code(at) && next < end_of_stack(current); next += sizeof next) at = *(char**)next;
    if (is_code(at)) snprintf(where.text, sizeof where.text, "<%x>: ", place_of(at));
    return where;
}

// What goes wrong in a kernel ends the kernel, not the process: a notebook goes on.
static void on_signal(int number, siginfo_t* info, void* context) {
    if (number == SIGINT) stopped = INTERRUPTED;
    if (number == SIGINT || number == SIGURG) {
        if (!stopped) return;
        if (!runs_here) pthread_kill(runner, SIGURG);
        else if (in_a_stack(registers(context).stack_pointer)) FAIL("%s%s", line_of(context).text, stopped);
        else if (fibers[current].place.at) report("<%x>: %s", place_of(fibers[current].place.at), stopped);
        else report("%s", stopped);
        return;
    }
    if (!runs_here || error[0] ||
        !in_a_stack(registers(context).stack_pointer)) {  // not a fault of the kernel: it comes again, to the process
        for (int i = 0; i < SIGNALS; i++)
            if (signals[i] == number) sigaction(number, &before[i], nullptr);
        return;
    }
    char* address = (char*)info->si_addr;
    Where line = line_of(context);
    if (number == SIGFPE) FAIL("%sthread %d divides an integer by zero", line.text, current);
    else if (number == SIGILL) FAIL("%sthread %d comes to a place that it cannot come to", line.text, current);
    else if (in_a_stack(address))
        FAIL(
            "%sthread %d needs more than %d KiB of local memory: a large array, or a recursion without end", line.text,
            current, int(STACK_BYTES >> 10));
    else FAIL("%sthread %d reads or writes far out of bounds, at %p", line.text, current, address);
}

// As long as there is one, signals end the kernel; also before its first thread runs and after its last one.
struct Signals {
    stack_t theirs;

    Signals() {
        stack_t ours = {};
        ours.ss_sp = signal_stack, ours.ss_size = SIGNAL_STACK_BYTES;
        sigaltstack(&ours, &theirs);
        runner = pthread_self();
        runs_here = running = true;
        struct sigaction action = {};
        action.sa_sigaction = on_signal;
        action.sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK;  // the handler may not return
        for (int i = 0; i < SIGNALS; i++) {
            sigaction(signals[i], nullptr, &before[i]);
            if (signals[i] != SIGINT || before[i].sa_handler != SIG_IGN) sigaction(signals[i], &action, nullptr);
        }
    }
    ~Signals() {
        runs_here = running = false;
        for (int i = 0; i < SIGNALS; i++) sigaction(signals[i], &before[i], nullptr);
        sigaltstack(&theirs, nullptr);
    }
};

extern "C" EXPORTED void emulator_stop() {
    if (!running) return;
    stopped = "takes longer than CUPY_KERNELS_TIMEOUT allows, an environment variable with the seconds of a launch";
    pthread_kill(runner, SIGURG);
}

}  // namespace emulator
