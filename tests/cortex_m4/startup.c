/* The vector table of a Cortex-M4 and its reset: the floating-point unit is switched on before the C library starts. */
#include <stdint.h>

extern uint32_t stack_top;
extern void _start(void); /* of newlib with semihosting; it calls main */

static void reset(void) {
    *(volatile uint32_t *)0xE000ED88 |= 0xFu << 20; /* CPACR: full access to CP10 and CP11 */
    __asm volatile("dsb\n isb");
    _start();
}

static void fault(void) {
    for (;;) {
    }
}

__attribute__((section(".vectors"), used)) static const void *const vectors[16] = {
    &stack_top, (const void *)reset, (const void *)fault, (const void *)fault, (const void *)fault, (const void *)fault,
    (const void *)fault,
};
